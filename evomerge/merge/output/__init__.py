"""A merged model as a folder: checked, written tensor by tensor, with its card."""
