variable "name" {
  description = "Of everything that is made here. Names are seen by many: no site, study or person in it."
  type        = string
  default     = "mmimpute"
}

variable "oidc_provider_arn" {
  description = "The Kubernetes cluster's identity provider, which vouches for its service accounts."
  type        = string
}

variable "oidc_provider" {
  description = "The same provider without https://."
  type        = string
}

variable "service_accounts" {
  description = "Those that get the role, as infra/kubernetes names them."
  type        = list(string)
  default     = ["system:serviceaccount:mmimpute:ray", "system:serviceaccount:mmimpute:ray-head"]
}
