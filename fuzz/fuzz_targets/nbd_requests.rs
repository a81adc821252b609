#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| blockdev::nbd::fuzzing::nbd_requests(data));
