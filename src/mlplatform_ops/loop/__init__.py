"""The loop: drift, retraining, gate, shadow, canary, promotion, roll-back, all of it under load and with evidence."""
