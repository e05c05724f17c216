"""mergekit's files: converted to recipes, and recipes converted to mergekit's files.  Checked against mergekit 0.1.5.

From a file to a recipe:

    load_merge.py                opens a file of evomerge or of mergekit, with one merge or several
    parse_mergekit.py            parsed YAML becomes a `MergekitFile`, checked
    mergekit_file.py             what a file says, in mergekit's words: models, slices, parameters
    mergekit_methods.py          mergekit's methods and their parameters
    to_recipe.py                 a `MergekitFile` becomes a recipe
    filters_and_gradients.py     the value of a mergekit parameter for one tensor: filters, gradients, precedence
    chat_template.py             the text of a chat template

From a recipe to a file: from_recipe.py.  Both directions use coefficient_from_values.py, which finds the shortest
coefficient (numbers, lists, filters) for given values of the tensors.
"""
