"""One record of each form, as a line of JSONL; `cat.png` and `clip.mp4` lie beside the file (K2.5 §3.3)."""

EXAMPLES = {
    "text": {"text": "Cats sleep for most of the day."},
    "pair": {"image": "cat.png", "text": "A cat on a wall."},
    "video-text": {"video": "clip.mp4", "caption": "A cat jumps."},
    "ocr": {"image": "cat.png", "ocr": "BEWARE OF THE CAT"},
    "grounding": {"image": "cat.png", "boxes": [{"label": "cat", "box": [10, 20, 60, 40]}]},
    "screen": {"image": "cat.png", "elements": [{"type": "button", "text": "OK", "box": [10, 20, 60, 40]}]},
    "interleaved": {"parts": [{"text": "Before:"}, {"image": "cat.png"}, {"text": "After:"}, {"image": "cat.png"}]},
    "conversation": {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image", "image": "cat.png"}, {"type": "text", "text": "What is it?"}],
            },
            {"role": "assistant", "content": "A cat."},
        ]
    },
}
NOTE = """A medium is a path below the source's folder, a data URL, or base64 in image_base64 or video_base64. In messages
only what the assistant says is learnt; "weight": 0 in a turn or a record is not. OpenAI's fine-tuning form, ShareGPT's and
LLaVA's are read too. A folder holds pictures and videos with a caption beside each (cat.png, cat.txt), and texts."""
