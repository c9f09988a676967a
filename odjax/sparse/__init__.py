from odjax.sparse.wiring import Cut as Cut
from odjax.sparse.wiring import Ends as Ends
from odjax.sparse.wiring import Junction as Junction
from odjax.sparse.wiring import Wiring as Wiring
from odjax.sparse.wiring import compressed_model as compressed_model
from odjax.sparse.wiring import restrict_wiring as restrict_wiring
from odjax.sparse.wiring import wiring_of as wiring_of
