//! Writes a valid sharded safetensors model, the same bytes every time.

use std::{
    io::{BufWriter, Write as _},
    path::Path,
};

use serde_json::{Map, json};

/// Shards of the model.
const SHARDS: u64 = 4;
/// Tensors in a shard.
const TENSORS: u64 = 16;

/// Writes `model-0000N-of-0000M.safetensors`, their index and a `config.json` into `dir`; about
/// `size` bytes in all.
pub(super) fn write(dir: &Path, size: u64) -> std::io::Result<()> {
    // 1024 columns of F32.
    let rows = (size / SHARDS / TENSORS / 4096).max(1);
    let mut weights = Map::new();
    let mut random = Random(0x2545_f491_4f6c_dd1d);
    for shard in 0..SHARDS {
        let name = format!("model-{:05}-of-{SHARDS:05}.safetensors", shard + 1);
        let mut header = Map::new();
        header.insert("__metadata__".into(), json!({"format": "pt"}));
        for tensor in 0..TENSORS {
            let layer = shard * TENSORS + tensor;
            let begin = tensor * rows * 4096;
            let key = format!("model.layers.{layer:03}.weight");
            let end = begin + rows * 4096;
            let entry =
                json!({"dtype": "F32", "shape": [rows, 1024], "data_offsets": [begin, end]});
            header.insert(key.clone(), entry);
            weights.insert(key, json!(name));
        }
        let mut header = serde_json::to_vec(&header)?;
        header.resize(header.len().next_multiple_of(8), b' ');
        let mut file = BufWriter::with_capacity(1 << 20, std::fs::File::create(dir.join(&name))?);
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(&header)?;
        let mut block = [0u8; 4096];
        for _ in 0..TENSORS * rows {
            for word in block.chunks_exact_mut(4) {
                // Small floats, as weights are: never NaN.
                let value = (random.next() >> 40) as f32 / (1u64 << 24) as f32 - 0.5;
                word.copy_from_slice(&value.to_le_bytes());
            }
            file.write_all(&block)?;
        }
        file.flush()?;
    }
    let total = SHARDS * TENSORS * rows * 4096;
    let index = json!({"metadata": {"total_size": total}, "weight_map": weights});
    std::fs::write(
        dir.join("model.safetensors.index.json"),
        serde_json::to_vec(&index)?,
    )?;
    let config = json!({"model_type": "demo", "num_hidden_layers": SHARDS * TENSORS});
    std::fs::write(dir.join("config.json"), serde_json::to_vec_pretty(&config)?)
}

/// xorshift64*: fast, and good enough to be incompressible.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}
