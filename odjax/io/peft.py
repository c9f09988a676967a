"""Exchange of adapters with Hugging Face PEFT: `export_peft` and `import_peft`, and the same on folders."""

from odjax.io.peft_export import export_peft as export_peft
from odjax.io.peft_export import save_peft as save_peft
from odjax.io.peft_import import import_peft as import_peft
from odjax.io.peft_import import load_peft as load_peft
