"""Values and rules, without torch: errors, units, specs, recipe, budget, plan. Imports nothing else of effitrain."""
