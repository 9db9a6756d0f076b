# claims: has the compiler keep more blocks than it can
# kind: 10 MB programs
# guarded: syntax_error; refused

for _ in (1,):
  for _ in (1,):
   for _ in (1,):
    for _ in (1,):
     for _ in (1,):
      for _ in (1,):
       for _ in (1,):
        for _ in (1,):
         for _ in (1,):
          for _ in (1,):
           for _ in (1,):
            for _ in (1,):
             for _ in (1,):
              for _ in (1,):
               for _ in (1,):
                for _ in (1,):
                 for _ in (1,):
                  for _ in (1,):
                   for _ in (1,):
                    for _ in (1,):
                     for _ in (1,):  # <- attack
                      pass
