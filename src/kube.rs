//! kube: the face towards Kubernetes.

pub mod cache;
pub mod controller;
pub mod crd;
