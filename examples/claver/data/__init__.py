"""Videos and how they become clips: lists, files and shards, decoding, sampling, augmentation, loaders, and the toy motions."""
