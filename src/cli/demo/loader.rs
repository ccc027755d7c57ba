//! What an inference server does at start: map each safetensors file and read every tensor.

use std::{fs::File, path::Path, time::Instant};

use anyhow::Context as _;
use serde_json::Value;

use super::Loaded;

/// Longest header that is read, in bytes (the limit of the safetensors library).
const MAX_HEADER: u64 = 100_000_000;

pub(super) fn load(dir: &Path) -> anyhow::Result<Loaded> {
    let started = Instant::now();
    let mut files: Vec<_> = std::fs::read_dir(dir)
        .with_context(|| format!("cannot read {}", dir.display()))?
        .collect::<Result<Vec<_>, _>>()?
        .into_iter()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|e| e == "safetensors"))
        .collect();
    files.sort();
    anyhow::ensure!(
        !files.is_empty(),
        "{} has no safetensors files",
        dir.display()
    );
    let mut first = None;
    let (mut bytes, mut checksum) = (0, 0u64);
    for path in files {
        let file = File::open(&path)?;
        // SAFETY: the file is immutable: a download of this demo, or a read-only mount.
        let map = unsafe { memmap2::Mmap::map(&file)? };
        for tensor in tensors(&map).with_context(|| format!("{} is damaged", path.display()))? {
            let data = map
                .get(tensor)
                .context("a tensor lies outside of the file")?;
            for word in data.chunks_exact(8) {
                let word = u64::from_le_bytes(word.try_into()?);
                checksum = checksum.rotate_left(1) ^ word;
            }
            bytes += data.len() as u64;
            first.get_or_insert_with(|| started.elapsed().as_secs_f64());
        }
    }
    Ok(Loaded {
        first_tensor_seconds: first.unwrap_or_default(),
        whole_model_seconds: started.elapsed().as_secs_f64(),
        bytes,
        checksum,
    })
}

/// The byte ranges of the tensors, in file order.
fn tensors(file: &[u8]) -> anyhow::Result<Vec<std::ops::Range<usize>>> {
    let length = file.get(..8).context("it is shorter than 8 bytes")?;
    let length = u64::from_le_bytes(length.try_into()?);
    anyhow::ensure!(length <= MAX_HEADER, "its header claims {length} bytes");
    let base = 8 + length as usize;
    let header = file.get(8..base).context("its header is cut off")?;
    let header: serde_json::Map<String, Value> = serde_json::from_slice(header)?;
    let mut ranges = Vec::new();
    for tensor in header.values() {
        if let Some([begin, end]) = tensor
            .get("data_offsets")
            .and_then(Value::as_array)
            .map(Vec::as_slice)
        {
            let offset = |v: &Value| {
                v.as_u64()
                    .and_then(|v| usize::try_from(v).ok()?.checked_add(base))
            };
            ranges.push(offset(begin).context("bad offset")?..offset(end).context("bad offset")?);
        }
    }
    ranges.sort_by_key(|r| r.start);
    Ok(ranges)
}
