"""Dynamic sparse training: masks that change while a network is trained."""
