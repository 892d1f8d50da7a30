"""Fine-tuning with fewer tokens: time of a step, quality of the result; and the models that were trained here."""
