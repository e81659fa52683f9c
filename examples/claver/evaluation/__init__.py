"""What a model says of videos: evaluation and its reports, prediction, features and retrieval, the order of frames, WiSE-FT."""
