"""The short name of benchmarks.diffusion.diffusion_speed."""

from .diffusion.diffusion_speed import main

if __name__ == "__main__":
    main()
