#![no_main]

#[path = "../config.rs"]
mod target;

libfuzzer_sys::fuzz_target!(|data: &[u8]| target::config(data));
