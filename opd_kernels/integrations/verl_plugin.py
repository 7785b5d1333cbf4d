"""What verl's entry point loads, group ``verl.plugins``: importing it registers the loss modes."""

from opd_kernels.integrations.verl import register

register()
