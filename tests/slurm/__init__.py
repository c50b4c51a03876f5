"""What SLURM says, word for word, and executables that say it without a SLURM.

records/answers.txt   commands with their whole answer: `# name`, `$ command`, `> stdout`, `! stderr`, `= exit status`
records/squeue.txt    jobs as squeue shows them, one `Field=value` a line, for each state and each reason to wait
records/sacct.txt     jobs as sacct shows them
recorded.py           reads them
record.py             asks the test bed's SLURM (22.05.8) and writes them anew
fake.py               squeue, sacct, sbatch, scancel, scontrol and sinfo for the PATH of a unit test: fixture fake_slurm

What the records taught, and a reader of them has to know:
  squeue -O 'State:|,Reason:|' ends each value with the bar and cuts nothing; without it a value has 20 characters.
  Nothing to say is '' (NodeList while pending), '(null)' (Comment), 'N/A' (StartTime), 'None' (Reason), and in sacct
  'Unknown' (Start, End) or 'None assigned' (NodeList).
  The waiting part of an array is one line, `2_[2-9%2]`; its list is cut after 64 characters but for SLURM_BITSTR_LEN=0.
  squeue -j with one id that it does not know is an error (exit status 1); with several it leaves out the unknown.
  scancel of an unknown or ended id is silent and a success; scancel --signal of one is an error.
  scontrol requeue says "Requested operation is presently disabled" of a job that may not be requeued and of one that
  has ended, "Job is pending execution" of one that waits, and "Unexpected message received" when the controller is away.
  sbatch --test-only answers on stderr. Soon after the controller's start, before the nodes have registered, it calls
  everything impossible; behind jobs without a time limit it expects a start in some hundred years.
  sacct knows nothing of a job just submitted, and has no Restarts field; `-D` has one line for each run of a job.
"""
