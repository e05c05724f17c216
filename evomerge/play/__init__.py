"""The playground of a run (`evomerge play`): recipes moved by hand, in a page of this machine's browser.

sliders.py     what can be moved in a recipe, and the recipe after a move
presets.py     the recipes that one may begin with
playground.py  the live model: merge, answer, score, save; it knows nothing of the page
page.py        the page, made with Gradio
"""
