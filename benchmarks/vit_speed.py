"""The short name of benchmarks.vision.vit_speed."""

from .vision.vit_speed import main

if __name__ == "__main__":
    main()
