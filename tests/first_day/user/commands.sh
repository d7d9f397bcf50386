python make_data.py
dllm-rl train sft.yaml
dllm-rl train rl.yaml
dllm-rl eval runs/rl --json figures.json
dllm-rl export runs/rl --merge adder
dllm-rl export runs/rl adapter
dllm-rl eval rl.yaml model.path=adder --json again.json
dllm-rl generate adapter "2+2" --chat --max-new-tokens 4 --tokens-per-step 2
dllm-rl generate adder "2+2" --chat --max-new-tokens 4 --tokens-per-step 2 --show-steps --json text.json
python use_it.py adder
