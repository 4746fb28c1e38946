"""GenTron: the words that export, engines, runtime and command line share. Imports no torch."""

from pathlib import Path as _Path

__version__ = "0.1.0"

# Started inside a checkout, Python finds this bare folder before the installed package. The
# sibling folders (`runtime/`, `engines/`, ...) are its subpackages, so look there as well.
_checkout = _Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file():
    __path__.append(str(_checkout))
