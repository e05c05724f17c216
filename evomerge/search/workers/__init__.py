"""Workers: where jobs are done.  A worker has one device and knows nothing of the study.

- `worker.py`: the interface of a worker.
- `local_worker.py`: a thread of the driver's process.
- `process_worker.py`: a process of this machine, as the driver sees it: start it, send jobs, end it with its children.
  `process_main.py`: what runs inside that process.
- `ray_worker.py`: a Ray actor, perhaps on another machine.  `ray_cluster.py`: the cluster.
- `remote_evaluator.py`: how a worker outside the driver's process opens its models, and checks that they are the same.
- `worker_options.py`: what the command line says about workers.  `make_workers.py`: makes the workers of a search.
- `pool.py`: gives jobs to free workers; restarts a worker that dies or hangs, and gives its job to another one.
"""
