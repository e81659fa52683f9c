"""Weights as files: checkpoints, ours and the authors', models of the Hub, exported programs, and opening one for a command."""
