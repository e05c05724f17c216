"""The playground of a run (`evomerge play`): recipes moved by hand, in a page of this machine's browser.

sliders.py     what can be moved in a recipe, and the recipe after a move
controls.py    the same for the models of this playground
presets.py     the recipes that one may begin with
live_model.py  the live model, which holds one recipe at a time
answer.py      one free prompt, answered by the live model
examples.py    search items as prompts
playground.py  all of these together: ask, score, save; it knows nothing of the page
events.py      what the page does when something is moved, chosen or clicked (Gradio)
page.py        the page (Gradio)
serve.py       the server
"""
