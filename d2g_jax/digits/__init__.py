"""The embedded data set: scikit-learn's handwritten digits with captions measured from their pixels."""
