"""What a run starts from."""

from pathlib import Path

from .errors import UserError


def find_config_folder(name: str) -> Path:
    """The folder of a config: a path that has a config.json, or a name that ships with the code.

    Raises:
        UserError: neither; lists the names.
    """
    packaged = Path(__file__).parent
    for folder in (Path(name), packaged / name, packaged / Path(name).name):
        if (folder / "config.json").is_file():
            return folder
    names = ", ".join(sorted(path.parent.name for path in packaged.glob("*/config.json")))
    raise UserError(
        f"unknown config {name!r}: expected a folder with config.json or one of {names}"
    )
