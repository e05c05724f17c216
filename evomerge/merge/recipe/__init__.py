"""The recipe: a complete description of one merge, and the layout of the model that it makes."""
