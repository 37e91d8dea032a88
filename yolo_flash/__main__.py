"""`python -m yolo_flash` is `yolo-flash`."""

from .cli import main

if __name__ == "__main__":
    main()
