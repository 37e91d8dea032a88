"""The program: `yolo-flash`, and `python -m yolo_flash`."""

import contextlib
import sys


def main() -> None:
    """Run the command line of this process."""
    # At its very first import Ultralytics greets on standard output, where `checks --json` promises JSON alone. Its
    # logger keeps the stream that it finds now.
    with contextlib.redirect_stdout(sys.stderr) if "--json" in sys.argv else contextlib.nullcontext():
        from .cli.main import main as run
    run()


if __name__ == "__main__":
    main()
