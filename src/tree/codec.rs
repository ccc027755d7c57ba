//! placeholder
use super::*;
impl Artifact {
    /// The binary encoding.
    pub fn encode(&self) -> Vec<u8> {
        unimplemented!()
    }
    /// Decodes.
    pub fn decode(_bytes: &[u8]) -> Result<Artifact, TreeError> {
        unimplemented!()
    }
}
