#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| memdev_fuzz::partition::body(data));
