"""From a recipe to weights: planners decide, two kernels do, and nothing else merges."""
