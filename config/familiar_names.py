"""Names that people bring along from scripts and from other servers, and what to write instead. Read where one is
refused; nothing here is understood.
"""


def _names(names: str, sentence: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), sentence)


def _set(setting: str, value: str) -> str:
    return f'a worker is started with KEYE_{setting.upper()}={value}, an Analyzer with {setting}="{value}"'


_NEEDLESS = "the worker does that by itself: leave it out"
_NEW_TOKENS = "the longest answer is max_new_tokens, in generation"
_THINKING = 'it is thinking: "auto", "think" or "no_think"'
_BUDGET = "the longest thinking is max_thinking_tokens, in generation"
_MEDIA = "images and videos are media, one or a list of them; in a message, parts of its content"
_PROMPT = "the question is prompt; in a message, its content"
_RATE = "fps of a video's part is how many frames a second are read, max_frames the most of them"
# Of those that this release itself has, the ones nearest to a job.
_SETTINGS = ("precision", "device", "model_path", "gpu_memory_fraction", "concurrency", "media_roots", "allow_https")

# What a model, a processor or a server is made with.
OF_A_WORKER = {
    **_names("load_in_8bit", _set("precision", "int8")),
    **_names("load_in_4bit", _set("precision", "int4")),
    **_names("quantization quantization_config bits", _set("precision", "int8") + ", or int4"),
    **_names("torch_dtype dtype", _set("precision", "bfloat16") + ", or auto, float16, float32"),
    **_names("device_map gpu gpus cuda", _set("device", "cuda") + "; `keye-worker run --gpus 0,1` says which GPUs"),
    **_names("tensor_parallel_size", "a GPU has a model of its own: `keye-worker run --gpus all`"),
    **_names("gpu_memory_utilization max_memory", _set("gpu_memory_fraction", "0.8")),
    **_names("enable_prefix_caching", _set("prefix_cache", "true")),
    **_names(
        "model model_id model_name checkpoint pretrained_model_name_or_path name_or_path",
        _set("model_path", "/srv/models/Keye-VL-1_5-8B"),
    ),
    **_names(
        "attn_implementation use_flash_attention_2 use_flash_attn flash_attention",
        "the fastest attention that is right on the device is found when the model is loaded: leave it out",
    ),
    **_names("trust_remote_code", "no code from a checkpoint is executed: leave it out"),
    **_names(
        "batch_size max_batch_size max_num_seqs",
        "jobs join the running batch by themselves: submit them all, and the engine runs as many as it has room for",
    ),
    **_names("max_model_len", "the context is the checkpoint's: leave it out"),
    **_names("low_cpu_mem_usage use_safetensors use_cache padding padding_side return_tensors use_fast", _NEEDLESS),
}

# What `generate` of transformers, or another server, is asked with.
OF_A_JOB = {
    **_names("do_sample", "temperature, in generation, says it: 0 is greedy, above 0 draws"),
    **_names("max_tokens max_length max_completion_tokens max_output_tokens num_predict", _NEW_TOKENS),
    **_names(
        "num_beams num_beam_groups beam_size use_beam_search length_penalty early_stopping",
        "there is no beam search: leave it out",
    ),
    **_names("eos_token_id pad_token_id bos_token_id stop_token_ids", "it is the checkpoint's: leave it out"),
    **_names("stop_strings stop_sequences stopping_criteria", "texts that end the answer are stop, in generation"),
    **_names("presence_penalty frequency_penalty no_repeat_ngram_size", "there is repetition_penalty, in generation"),
    **_names("num_return_sequences best_of num_samples samples", "how many answers are drawn is n, in generation"),
    **_names("min_new_tokens min_length", "the shortest answer is min_tokens, in generation"),
    **_names("output_scores return_logprobs", "logprobs, in generation, has the result tell those of what was written"),
    **_names("top_logprobs prompt_logprobs", "there are only those of what was written: logprobs, in generation"),
    **_names(
        "response_format guided_json guided_regex guided_choice structured_outputs json_schema schema output_schema "
        "response_model text_format regex choices grammar guided_grammar",
        "what the answer has to fit is response_schema: a JSON Schema, a regular expression or a list of choices",
    ),
    **_names("random_seed manual_seed", "it is seed, in generation"),
    **_names("stream streamer", "every job can be followed while it runs: job.events(), or keye watch"),
    **_names("thinking_mode enable_thinking think", _THINKING),
    **_names("chat_template_kwargs chat_template", f"the template is the checkpoint's. Whether it thinks: {_THINKING}"),
    **_names("thinking_budget budget_tokens max_reasoning_tokens", _BUDGET),
    **_names("reasoning_effort", f"{_BUDGET}, and {_THINKING}"),
    **_names("image images image_path image_paths image_url image_urls pixel_values", _MEDIA),
    **_names("video videos video_path video_paths video_url file files path paths url urls", _MEDIA),
    **_names("text texts question query instruction input inputs user_prompt", _PROMPT),
    **_names("prompts queries", 'several about the same media are questions, as in [{"prompt": "What is it?"}]'),
    **_names("conversation conversations chat history", "a chat is messages"),
    **_names("system system_prompt", "it is a message of the role system, the first of messages"),
    **_names("nframes num_frames min_frames max_num_frames", _RATE),
    **_names("video_fps frame_rate sample_fps", _RATE),
    **_names("video_start start_time", "it is start_seconds of a video's part"),
    **_names("video_end end_time", "it is end_seconds of a video's part"),
    **_names("total_pixels video_max_pixels size longest_edge", "max_pixels of a part bounds each image or frame"),
    **_names("timeout timeout_seconds max_time", "it is deadline_seconds"),
    **_names("retries max_retries num_retries", "it is max_attempts"),
    **_names("id job_id task_id request_id", "the client chooses it; a name of your own is idempotency_key"),
    **_names("tools tool_choice", "there is nothing like it: say it in the prompt"),
    **_names("add_generation_prompt skip_special_tokens", _NEEDLESS),
    **{name: f"it is the worker's, not a job's: {sentence}" for name, sentence in OF_A_WORKER.items()},
    **{name: f"it is a setting of the worker, KEYE_{name.upper()}" for name in _SETTINGS},
}
