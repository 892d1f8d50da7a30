"""Fine-tuning and pretraining with fewer tokens: time of a step, quality of the result; models that were trained."""
