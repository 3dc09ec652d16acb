"""One thread per process: pytest runs two, and so do the processes that tests start."""
import os

os.environ['OMP_NUM_THREADS'] = '1'
