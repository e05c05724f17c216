"""Where models come from: checkpoints and adapters, their anatomy, whether they fit together, who they are."""
