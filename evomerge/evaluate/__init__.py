"""From a live model to item scores.

The chain: items -> requests -> token ids -> batches -> forwards -> scores.  All steps before the forwards are done once
for a run; a candidate costs only its forwards and the scores.

    taskfile.py         read and check lm-eval's task files
    open_tasks.py       open the tasks of a configuration; task_metrics.py: the metrics that it names
    tasks.py            a task with its settings, and its documents as items; deal.py: the items of the three splits
    requests.py         lm-eval's requests of an item as token ids
    workload.py         the requests of many items with their batches
    prepared_items.py   the requests of items as files, for a resume
    prefix_plan.py      which tokens of many sequences are computed once, and which sequences share a row
    token_budget.py     how many tokens a forward may have
    capabilities.py     which kinds of forwards the model's architecture supports
    kv_cache.py         keys and values that rows share, and those of a generation
    loglikelihood.py    batches for log-likelihoods, and their forwards
    generation.py       batches for generated answers, and their forwards
    metrics.py          the table of metrics
    formulas.py         their formulas: the value of one item from what the model answered
    item_values.py      from answers to the values of metrics and to item scores
    answer_metrics.py   from what the forwards gave to answers, and to all metrics of a task
    engine.py           `Engine`: the chain for one live model
    gradient.py         the gradient of the objective: forwards that keep their graph, and their backward passes
    standalone.py       score one model on whole tasks (`evomerge evaluate`)
    clock.py            seconds, forwards and tokens; where the work may be interrupted

and three that decide which candidates are scored in full:

    canary.py           refuse a candidate whose language is broken, by one forward
    racing.py           stop a candidate that is worse than the incumbent (sequential test)
    looks.py            after how many items a race tests

Letters of shapes: B rows of a batch, W tokens of a padded row (its width), T tokens of a sequence, V tokens of the
vocabulary, H hidden size, K positions whose logits are computed, M scored tokens; in racing N items of all tasks,
n items of a chunk, C finished candidates.
"""
