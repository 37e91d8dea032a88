"""The program: `yolo-flash`, and `python -m yolo_flash`."""

import contextlib
import sys


def main() -> None:
    """Run the command line of this process."""
    if "--json" in sys.argv:  # JSON alone shall reach standard output
        with contextlib.redirect_stdout(sys.stderr):
            import ultralytics  # noqa: F401  greets when first imported; its logger keeps the stream that it finds
    from .cli.main import main as run

    run()


if __name__ == "__main__":
    main()
