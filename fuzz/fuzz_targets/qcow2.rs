#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| memdev_fuzz::qcow2::body(data));
