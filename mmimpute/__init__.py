"""Multi-modal imputation of patient records at population scale."""

__version__ = "0.1.0"
