"""The playground of a run (`evomerge play`): recipes moved by hand, in a page of this machine's browser.

sliders.py     what can be moved in a recipe, and the recipe after a move
presets.py     the recipes that one may begin with
answer.py      one free prompt, answered by the live model
playground.py  the live model: merge, answer, score, save; it knows nothing of the page
events.py      what the page does when something is moved, chosen or clicked (Gradio)
page.py        the page (Gradio)
serve.py       the server
"""
