"""Problems that a program can judge: each folder holds a task (prompt, job, rewards) and what runs in the sandbox."""
