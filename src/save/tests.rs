//! Files of every kind, as `qemu-img` sees them.

use super::*;
use std::process::Command;

/// A source by the byte.
struct Bytes {
    data: Vec<u8>,
    /// Which blocks of 4 KiB were written, and whether each is told to be zero.
    blocks: Vec<Kind>,
}

impl Bytes {
    /// Blocks of these kinds over a base of ones, and a last one of `rest` bytes.
    fn new(blocks: Vec<Kind>, rest: usize) -> Self {
        let mut data = Vec::new();
        for (at, kind) in blocks.iter().enumerate() {
            let byte = u8::try_from(at % 250).unwrap() + 2;
            data.resize(
                data.len() + 4096,
                match kind {
                    Kind::Nothing => 1,
                    Kind::Zero => 0,
                    Kind::Data => byte,
                },
            );
        }
        data.truncate(data.len() - 4096 + rest);
        Self { data, blocks }
    }

    fn base(&self) -> Vec<u8> {
        vec![1; self.data.len()]
    }
}

impl Source for Bytes {
    fn size(&self) -> u64 {
        self.data.len() as u64
    }

    fn extents(&mut self, written: bool) -> Result<Vec<Extent>> {
        let size = self.size();
        let kinds = self.blocks.iter().map(|kind| match kind {
            Kind::Nothing if !written => Kind::Data,
            kind => *kind,
        });
        let range = |at: u64| at * 4096..((at + 1) * 4096).min(size);
        Ok((0..).zip(kinds).map(|(at, kind)| Extent { range: range(at), kind }).collect())
    }

    fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let at = usize::try_from(offset).unwrap();
        buffer.copy_from_slice(&self.data[at..at + buffer.len()]);
        Ok(())
    }
}

fn qemu_img(args: &[&std::ffi::OsStr]) {
    let out = Command::new("qemu-img").args(args).output().expect("qemu-img, which tools/setup installs");
    let (said, failed) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success() && failed.is_empty(), "qemu-img {args:?}: {said}{failed}");
}

fn check(source: &mut Bytes) {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    std::fs::write(path("base"), source.base()).unwrap();
    std::fs::write(path("expected"), &source.data).unwrap();
    let formats =
        [("raw", Format::Raw), ("qcow2", Format::Qcow2), ("qcow2", Format::Qcow2Over(path("base")))];
    for (name, format) in formats {
        let (file, mut last) = (path("saved"), None);
        // It takes the place of what was there.
        save(source, &file, &format, &mut |done, all| {
            last = Some((done, all));
            Ok(())
        })
        .unwrap();
        assert!(last.is_some_and(|(done, all)| done == all), "{last:?}");
        if format == Format::Raw {
            assert!(std::fs::read(&file).unwrap() == source.data);
        } else {
            qemu_img(&["check".as_ref(), "-q".as_ref(), "-f".as_ref(), name.as_ref(), file.as_ref()]);
        }
        let expected = path("expected");
        qemu_img(&[
            "compare".as_ref(),
            "-q".as_ref(),
            "-f".as_ref(),
            "raw".as_ref(),
            "-F".as_ref(),
            name.as_ref(),
            expected.as_ref(),
            file.as_ref(),
        ]);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 3, "nothing else is left");
    }
}

#[test]
fn what_is_saved_is_what_was_there() {
    use Kind::{Data, Nothing, Zero};
    // In several L2 tables, some of which are not there, in blocks that end in the midst of clusters, with an end that is
    // no whole block nor sector.
    let kinds = |count: usize, kind: fn(usize) -> Kind| (0..count).map(kind).collect::<Vec<_>>();
    check(&mut Bytes::new(kinds(1, |_| Nothing), 4096));
    check(&mut Bytes::new(kinds(1, |_| Data), 512));
    check(&mut Bytes::new(kinds(1, |_| Zero), 1024));
    check(&mut Bytes::new(kinds(700, |at| [Nothing, Data, Zero, Data, Data][at % 5]), 1536));
    check(&mut Bytes::new(kinds(2100, |at| if (600..1700).contains(&at) { Data } else { Nothing }), 4096));
    check(&mut Bytes::new(kinds(1600, |at| if (500..1300).contains(&at) { Zero } else { Data }), 4096));
    check(&mut Bytes::new(kinds(4000, |_| Data), 2048));
}

/// QEMU knows sectors only, and takes a raw file's last one as if it were whole.
#[test]
fn an_end_within_a_sector_is_filled_with_zeroes() {
    let mut source = Bytes::new(vec![Kind::Data, Kind::Data, Kind::Data], 1000);
    check(&mut source);
}

#[test]
fn what_cannot_be_read_leaves_nothing() {
    struct Failing;
    impl Source for Failing {
        fn size(&self) -> u64 {
            1 << 20
        }
        fn extents(&mut self, _: bool) -> Result<Vec<Extent>> {
            Ok(vec![Extent { range: 0..1 << 20, kind: Kind::Data }])
        }
        fn read(&mut self, _: u64, _: &mut [u8]) -> Result<()> {
            Err(Error::new(ErrorKind::Io, "Broken"))
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("saved");
    std::fs::write(&path, "what was there before").unwrap();
    for format in [Format::Raw, Format::Qcow2, Format::Qcow2Over("base".into())] {
        assert_eq!(save(&mut Failing, &path, &format, &mut |_, _| Ok(())).unwrap_err().kind(), ErrorKind::Io);
    }
    assert_eq!(std::fs::read(&path).unwrap(), b"what was there before");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn the_base_is_never_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let (base, link) = (dir.path().join("base"), dir.path().join("link"));
    std::fs::write(&base, [1; 4096]).unwrap();
    std::os::unix::fs::symlink(&base, &link).unwrap();
    let mut source = Bytes::new(vec![Kind::Data], 4096);
    for path in [&base, &link] {
        let error =
            save(&mut source, path, &Format::Qcow2Over(base.clone()), &mut |_, _| Ok(())).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
    }
    assert_eq!(std::fs::read(&base).unwrap(), [1; 4096]);
    let folder = save(&mut source, dir.path(), &Format::Raw, &mut |_, _| Ok(())).unwrap_err();
    assert!(folder.to_string().starts_with("Cannot write"), "{folder}");
}
