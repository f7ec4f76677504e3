"""The face of every learner: meta_step, forward, adapt, evaluate, unwrap, describe."""
