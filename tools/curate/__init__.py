"""From an archive of DICOM and other files to a checked, deduplicated and split pre-training set."""
