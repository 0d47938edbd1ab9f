"""A discrete-event simulator that drives the scheduler's own ledger, admission and policies on modelled workers."""
