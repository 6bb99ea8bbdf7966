"""Arithmetic tasks: modular and whole-number arithmetic with one token per number, and digit-wise addition."""

from circuits.tasks.arithmetic.addition import Addition
from circuits.tasks.arithmetic.digit_addition import DigitAddition
from circuits.tasks.arithmetic.modular_addition import ModularAddition

__all__ = ["Addition", "DigitAddition", "ModularAddition"]
