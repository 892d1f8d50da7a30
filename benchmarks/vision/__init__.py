"""Speed and quality of reduced vision models: classifiers, segmentation, detectors' encoders, dense heads."""
