//! Code that protobuf compilers made; `fixtures/proto/generate` makes it anew. Nothing here is
//! written by hand, and nothing outside of the faces uses it.
#![expect(
    missing_docs,
    clippy::allow_attributes,
    clippy::doc_markdown,
    reason = "generated"
)]

/// containerd's API.
pub mod containerd {
    /// `containerd.types`.
    pub mod types;
    /// `containerd.services`.
    pub mod services {
        /// `containerd.services.images`.
        pub mod images {
            /// `containerd.services.images.v1`.
            pub mod v1;
        }
        /// `containerd.services.snapshots`.
        pub mod snapshots {
            /// `containerd.services.snapshots.v1`.
            pub mod v1;
        }
    }
}

/// The Container Storage Interface.
pub mod csi {
    /// `csi.v1`.
    pub mod v1;
}
