"""One trainer for every strategy: a specialised transformers.Trainer."""
