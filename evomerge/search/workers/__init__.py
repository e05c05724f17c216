"""Who turns recipes into scores: this process, processes of this machine, or Ray actors on many; one pool over all."""
