# claims: gives the judge something else than a function
# kind: non-str and huge returns
# guarded: crash; detail defines no function pick

pick = 3
